"""Static pruning: rules that say which weights of a layer may go."""
