"""A decision threshold and a temperature, fitted on the validation rows of a finished run."""
