"""How much memory a run takes, predicted before it starts: structure, activations, what a device adds, and `fit`."""
