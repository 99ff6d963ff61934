# A small GPT for your code, on a GPU. First, as in docs/code.md: prepare/tokenizer.py --code --vocab_size=16384, and
# prepare/code.py.
#
#   python train.py configs/train_code.py
#
# One GPU. Not run yet: time and loss are not measured, and the rates are those of fast_gpt2.py. 1,500 iterations are
# four epochs of 50 MB of code at 4 bytes a token; --plan counts yours.

out_dir = "out-code"
eval_interval = 200
eval_iters = 100
log_interval = 10
always_save_checkpoint = False

dataset = "code"
batch_size = 32
block_size = 1024
gradient_accumulation_steps = 1  # 32,768 tokens an iteration

# Qwen3's family, so that export.py can write it: 34 million weights with 16,384 tokens
n_layer = 8
n_head = 8
n_embd = 512
position = "rope"
norm = "rmsnorm"
mlp = "swiglu"
qk_norm = True
dropout = 0.1

optimizer = "muon"
muon_lr = 0.02
learning_rate = 0.003
weight_decay = 0.1
schedule = "wsd"
decay_fraction = 0.4
max_iters = 1500
warmup_iters = 50
min_lr = 0.0
