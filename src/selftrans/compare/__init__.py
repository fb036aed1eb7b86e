"""Methods side by side under one budget: `command` is what people call, `engine` trains and measures, `table` sums up."""
