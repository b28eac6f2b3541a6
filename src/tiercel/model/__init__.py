"""What the network is: decoder → block → mixers and feed-forward, and what each of them remembers."""
