"""Trains DeepLabv3.

Examples:
  python train.py --config configs/voc_os16.py --workdir runs/voc
  python train.py --config configs/shapes.py --workdir runs/shapes --config.train.steps=100

The same command, run again, resumes the run. Every field of the config is a flag:
--config.optimizer.learning_rate=0.01, --config.model.multi_grid=1,2,4. All fields are in
deeplab_jax/config/schema.py.

On a TPU pod, under srun and under mpirun, start the same command on every host: together they are
one run. Elsewhere, say where process 0 is; two processes on one machine:
  python train.py --config ... --coordinator=localhost:1234 --num_processes=2 --process_id=0 &
  python train.py --config ... --coordinator=localhost:1234 --num_processes=2 --process_id=1
Data and workdir must be the same paths on all hosts, on a shared file system. See docs/pods.md.
"""

from absl import flags

from deeplab_jax.cli import train

flags.adopt_module_key_flags(train)

if __name__ == "__main__":
    train.start()
