"""Which strategy is better: models, recipes, ratios, seeds and calibration sets, compared with error bars."""
