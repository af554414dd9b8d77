"""From preference shards on disk to micro-batches: samples, shards, lengths, plan, images, collate, loader."""
