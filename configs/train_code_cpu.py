# A small GPT for your code, on a laptop. First, as in docs/code.md: prepare/tokenizer.py and prepare/code.py.
#
#   python train.py configs/train_code_cpu.py
#
# On Python's standard library (docs/code.md), two cores of an AMD EPYC beside other programs: val loss 3.73 nats a
# token, 1.63 bits per byte.

out_dir = "out-code"
eval_interval = 200
eval_iters = 20
log_interval = 20
always_save_checkpoint = False

dataset = "code"
device = "cpu"
gradient_accumulation_steps = 1
batch_size = 8
block_size = 256

# Qwen3's family, so that it can be exported: 4.2M weights with 4,096 tokens
n_layer = 4
n_head = 4
n_embd = 256
position = "rope"
norm = "rmsnorm"
mlp = "swiglu"
qk_norm = True

optimizer = "muon"
muon_lr = 0.02
learning_rate = 0.01
weight_decay = 0.0
schedule = "wsd"
decay_fraction = 1.0
max_iters = 600
warmup_iters = 0
min_lr = 0.0
