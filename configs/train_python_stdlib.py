# A first GPT: it learns to write Python, from the sources that came with Python. First: python prepare/python_stdlib.py
#
#   python train.py configs/train_python_stdlib.py
#
# 2 CPU cores, about 3 minutes, val loss 1.40 nats a character. `make demo` runs it and prints samples.

out_dir = "out-python-stdlib"
eval_interval = 250
eval_iters = 40
log_interval = 10

dataset = "python_stdlib"
gradient_accumulation_steps = 1
batch_size = 16
block_size = 128  # characters it can look back on

n_layer = 4
n_head = 4
n_embd = 128
# what came after GPT-2 learns faster: with position="learned", norm="layernorm", mlp="gelu", qk_norm=False it needs
# more than twice the iterations, and without short_conv ends at 1.47
position = "rope"
norm = "rmsnorm"
mlp = "relu2"
qk_norm = True
short_conv = 2

learning_rate = 4e-3
max_iters = 750
lr_decay_iters = 750
min_lr = 4e-4
warmup_iters = 50
beta2 = 0.99
