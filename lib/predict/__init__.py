"""`python -m lib.predict`: predict the rows of files with the model of a finished run."""
