"""The public methods of `StrategyBase`, by concern."""
