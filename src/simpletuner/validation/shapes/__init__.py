"""The world of chroma-nano: plain shapes on plain grounds, their words, and eyes that read them back.

`recipes/nano` draws its pictures; here is what a run needs to score itself, without torch.
"""
