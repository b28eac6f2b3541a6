"""What the network is: decoder → block → mixers and feed-forward, and the state of each."""
