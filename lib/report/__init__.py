"""What a finished run leaves: results, predictions, model card, and the report page."""
