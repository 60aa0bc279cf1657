"""Schedulers with diffusers' names, arguments and verbs, on our samplers: one line switches a pipeline.

    pipe.scheduler = fastgen.interop.diffusers.DDIMScheduler.from_config(pipe.scheduler.config)

diffusers saves pipelines with schedulers of its own: go back by ``diffusers.DDIMScheduler.from_config(pipe.scheduler.config)``
before ``pipe.save_pretrained``.

Arguments, defaults, layouts of the steps and, with ``generator=``, the noise are those of diffusers 0.42.1, its errors and the
rounding of its tables included where results depend on them (:mod:`fastgen.diffusion.upstream`). States of 50 steps in float32
agree to 2e-6 of their scale with most, to 1.1e-5 with the worst configuration that is tested; what is left is the order of the
last operations. Weights of the third order that upstream's own float32 loses are right here: DEIS and SA-Solver, good to 3e-4
there, and the single-step SDE with "heun". An estimate of the data at high noise is a difference of large numbers on both
sides, and agrees to 6e-5.

A value that upstream cannot use either raises a ValueError that names its argument. ``DDIMScheduler(exact_steps=True)`` steps
to the next of its own times, where diffusers' DDIM steps back by a fixed stride and, with linspace and trailing spacing,
misses it.
"""
