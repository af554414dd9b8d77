"""From shards on disk to the micro-batches of one rank, in stages; each file knows only those before it.

1. What is stored. `samples` says what one sample holds, `manifest` and `index` what a packed set holds, and `shards`
   reads it. `remote` (with `web`) fetches sets that lie elsewhere, `ahead` before they are asked for.
2. What is counted. `lengths` counts each sample's tokens once and keeps them in side-cars beside the set.
3. What comes when. `order` puts all samples of all epochs into one endless order, a function of the position alone;
   `exclude` leaves some out. `units` says what shares a row and what that costs, `dealing` deals it to the ranks, and
   `plan` makes of all that the steps: integers, equal on every rank.
4. What is read. `images` (with `image_cost`) decodes pixels, `collate` packs encoded samples into a row of prefix
   trees, and `loader` does both in workers and hands out the PackedBatch of each micro-batch.
5. What is known of them. `reference_cache` keeps the reference model's log-probs of every completion.
"""
