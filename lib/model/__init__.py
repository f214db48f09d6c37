"""The tokenizer and the model, from the hub or a folder, ready to be trained."""
