"""What is learned: the importance network (which weights matter), and how to train it."""
