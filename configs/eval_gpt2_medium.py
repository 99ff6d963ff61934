# The loss of OpenAI's gpt2-medium (350M) on OpenWebText. First: python prepare/openwebtext.py
#
#   python train.py configs/eval_gpt2_medium.py
#
# One GPU, minutes; train loss 2.85, val loss 2.84 (nanoGPT's figures).

init_from = "gpt2-medium"
eval_only = True
eval_iters = 500
batch_size = 8
