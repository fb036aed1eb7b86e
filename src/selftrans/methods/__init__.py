"""Training methods: `objective` and `guidance` are shared, each other file is a method, `registry` lists them."""
