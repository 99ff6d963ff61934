# The loss of OpenAI's gpt2-xl (1558M) on OpenWebText. First: python prepare/openwebtext.py
#
#   python train.py configs/eval_gpt2_xl.py
#
# One GPU, minutes; train loss 2.56, val loss 2.54 (nanoGPT's figures).

init_from = "gpt2-xl"
eval_only = True
eval_iters = 500
batch_size = 8
