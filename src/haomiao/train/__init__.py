"""Learning: pretraining, fine-tuning, distillation. Needs PyTorch (`pip install 'haomiao[torch]'`).

A model is its plan (`models.plan`) and its weights in the plan's own shapes: `graph` runs the one on the other with
gradients, `weights` brings them in from a checkpoint or an artifact and out again. Whatever family the engine runs can
be trained. Nothing here is imported while serving.
"""
