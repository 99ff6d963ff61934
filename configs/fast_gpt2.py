# GPT-2 124M on OpenWebText as train_gpt2.py, with what has been learnt since: rotary positions, RMSNorm, normalised
# queries and keys, squared ReLU, Muon, warm-up - stable - decay. First: python prepare/openwebtext.py
#
#   torchrun --standalone --nproc_per_node=8 train.py configs/fast_gpt2.py
#
# Eight GPUs. Time and loss are not measured at this size. With 6 layers, 256 wide, on Python's standard library in
# GPT-2's tokens, it reaches train_gpt2.py's final loss with less than a third of its tokens (dev/LOG.md).

out_dir = "out-fast-gpt2"
eval_interval = 250
eval_iters = 200
log_interval = 10

dataset = "openwebtext"
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8  # 491,520 tokens an iteration

n_head = 6  # heads of 128 channels learn faster here than 12 of 64, and cost less
position = "rope"
norm = "rmsnorm"
qk_norm = True
mlp = "relu2"

optimizer = "muon"
muon_lr = 0.02
learning_rate = 0.003
weight_decay = 0.1
schedule = "wsd"
decay_fraction = 0.4
max_iters = 20000  # 9.8 billion tokens
warmup_iters = 250
min_lr = 0.0
