"""The deepspeed backend: ZeRO-1, 2 and 3, every rank a data parallel copy.

`checkpoint` reads without deepspeed; everything else imports it when a training begins.
"""
