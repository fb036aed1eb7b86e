"""The local page of `selftrans ui`: runs live, next to each other, sampled; it reads what runs write and writes nothing."""
