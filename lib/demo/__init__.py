"""The built-in corpus and tiny model of `--demo`, and how the model was pretrained."""
