# The loss of OpenAI's gpt2-large (774M) on OpenWebText. First: python prepare/openwebtext.py
#
#   python train.py configs/eval_gpt2_large.py
#
# One GPU, minutes; train loss 2.66, val loss 2.67 (nanoGPT's figures).

init_from = "gpt2-large"
eval_only = True
eval_iters = 500
batch_size = 8
