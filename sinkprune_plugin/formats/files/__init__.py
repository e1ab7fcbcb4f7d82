"""What a checkpoint is made of on disk: headers, shards, their index, and the parts of a weight in them."""
