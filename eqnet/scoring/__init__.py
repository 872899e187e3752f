"""How good a config is: measured, predicted, or estimated without training."""
