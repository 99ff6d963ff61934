# The loss of OpenAI's gpt2 (124M) on OpenWebText. First: python prepare/openwebtext.py
#
#   python train.py configs/eval_gpt2.py
#
# One GPU, minutes; train loss 3.11, val loss 3.12 (nanoGPT's figures).

init_from = "gpt2"
eval_only = True
eval_iters = 500
batch_size = 8
