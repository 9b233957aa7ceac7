"""MEGAN (arXiv 1805.02481) as a system: n generators, a gate that chooses among them, WGAN-GP.

The generators are sharded along the mesh's expert axis. Each device runs its generators on all latents of its `data`
block; the gated images are then sharded over all devices. The gate is a separate network, since its optimizer differs.

  B batch, n generators, Z latent width
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from aurora_jax.ops import random_keys
from aurora_jax.parallel import mesh as mesh_lib
from aurora_jax.parallel.mesh import KeyPath, ParamLabel, names_of
from aurora_jax.systems import base, metric_names
from aurora_jax.systems.megan import annealing, losses
from aurora_jax.systems.megan import config as config_lib
from aurora_jax.systems.megan.discriminator import Discriminator
from aurora_jax.systems.megan.generator import Generator, GeneratorOutput, join_gate, split_gate

_STATISTICS = "batch_stats"


def label(path: KeyPath) -> ParamLabel:
  """The label of a parameter, or of a batch norm's statistic; all arrays under "generators" are stacked by
  generator.
  """
  names = names_of(path)
  module = next((name for name in names[:-1] if name != "generators"), names[0])
  return ParamLabel(experts=names[0] == "generators", bias=names[-1] == "bias", module=module, group=module)


class Draws(NamedTuple):
  """The random numbers of one forward pass.

  Attributes:
    z: [B, Z] from N(0, 1), the latents.
    uniform: [B, n] from U[0, 1), for the gate's noise.
    alpha: [B] from U[0, 1): the points between real and generated images at which the gradient penalty is taken.
  """

  z: jax.Array
  uniform: jax.Array
  alpha: jax.Array


class System(base.System[config_lib.Experiment]):
  """See `base.System`."""

  truncates = False
  sampled = ("generator", "gate")
  headline = ("loss/d_wasserstein", "loss/g_wasserstein", "loss/gp")
  remedies = {"expert_entropy": "loss.load_balance and loss.balance_weight"}

  def __init__(self, experiment: config_lib.Experiment, layout: mesh_lib.Layout | None = None):
    super().__init__(experiment, layout)
    self.generator = Generator(experiment.generator, self._place_stacked if self.layout.devices > 1 else None)
    self.discriminator = Discriminator(experiment.discriminator)
    self.active_experts = f"one of the {experiment.generator.generators} generators, as the gate chooses"
    optimizer = experiment.optimizer
    self.networks = {
      "generator": base.Network("g", optimizer.generator, label),
      "gate": base.Network("gate", optimizer.gate, label),
      "discriminator": base.Network("d", optimizer.discriminator, label),
    }

  @property
  def log_names(self) -> Mapping[str, str]:
    more = {"gp": "gradient penalty of the discriminator", "balance": "balance of the gate"}
    return {**super().log_names, **more}

  # ---- training ----------------------------------------------------------------------------------------------------

  def init(self, key: jax.Array) -> dict[str, base.Variables]:
    cfg = self.experiment.generator
    shapes = jnp.zeros((1, cfg.z_dim)), jnp.zeros((1, cfg.generators)), 1.0
    generator, gate = split_gate(Generator(cfg).init(random_keys.fold(key, "generator"), *shapes))
    image = jnp.zeros((1, cfg.resolution, cfg.resolution, 3))
    discriminator = self.discriminator.init(random_keys.fold(key, "discriminator"), image)
    return {"generator": generator, "gate": gate, "discriminator": discriminator}

  def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    side = self.experiment.resolution
    return {"image": jax.ShapeDtypeStruct((batch_size, side, side, 3), jnp.float32)}

  def phases(self, update: base.Update) -> Sequence[base.Phase]:
    """The discriminator's rounds, the update of generators and gate, and, with `loss.load_balance`, one that balances
    the gate."""
    loss = self.experiment.loss

    def train_discriminator(state, frozen, batch, key):
      """One round: an update by the Wasserstein loss, then one by the gradient penalty, by the same optimizer."""
      del frozen
      real = batch["image"]
      draws = self._draws(key)
      out, statistics = self._generate(state, state.networks["generator"].params, state.networks["gate"].params, draws)
      fake = jax.lax.stop_gradient(out.image)
      between = losses.interpolate(real, fake, draws.alpha)

      def wasserstein(params):
        real_score, fake_score = self._score(params, real), self._score(params, fake)
        value = losses.discriminator_wasserstein(real_score, fake_score)
        metrics = {"loss/d_wasserstein": value, "d/score_real": real_score.mean(), "d/score_fake": fake_score.mean()}
        return value, metrics

      def penalty(params):
        with jax.named_scope("gradient_penalty"):
          value = losses.gradient_penalty(lambda images: self._score(params, images), between)
        return loss.gradient_penalty_weight * value, {"loss/gp": value}

      def both(params):
        (first, metrics), (second, more) = wasserstein(params), penalty(params)
        return first + second, metrics | more

      of_d = lambda function, state: jax.grad(function, has_aux=True)(state.networks["discriminator"].params)
      bad = base.bad_images(real, fake)
      if not loss.gp_separate_step:
        gradients, metrics = of_d(both, state)
        state, all_finite, metrics = update(state, "discriminator", gradients, metrics | bad)
        return self._with_statistics(state, statistics, all_finite), metrics
      gradients, metrics = of_d(wasserstein, state)
      state, all_finite, metrics = update(state, "discriminator", gradients, metrics | bad)
      gradients, more = of_d(penalty, state)
      state, all_finite, more = update(state, "discriminator", gradients, more, all_finite=all_finite, log_name="gp")
      return self._with_statistics(state, statistics, all_finite), metrics | more

    def train_generator(state, frozen, batch, key):
      """Generators and gate on the discriminator's score of the gated images."""
      del frozen, batch

      def score(params):
        out, statistics = self._generate(state, params["generator"], params["gate"], self._draws(key))
        value = losses.generator_wasserstein(self._score(state.networks["discriminator"].params, out.image))
        metrics = {
          "loss/g_wasserstein": value,
          f"{metric_names.EXPERT_LOAD}generators": losses.load(jax.lax.stop_gradient(out.gate)),
        }
        return value, (metrics, statistics)

      params = {name: state.networks[name].params for name in self.sampled}
      gradients, (metrics, statistics) = jax.grad(score, has_aux=True)(params)
      metrics["gate/temperature"] = annealing.temperature(loss, state.step)
      state, all_finite, metrics = update(
        state, "generator", gradients["generator"], metrics, variables=statistics["generator"]
      )
      state, _, more = update(state, "gate", gradients["gate"], {}, all_finite=all_finite, variables=statistics["gate"])
      return state, metrics | more

    def balance(state, frozen, batch, key):
      """The gate toward equal use of the generators."""
      del frozen, batch

      def unequal(gate):
        out, statistics = self._generate(state, state.networks["generator"].params, gate, self._draws(key))
        value = losses.balance(out.gate)
        return annealing.balance_weight(loss, state.step) * value, ({"loss/balance": value}, statistics)

      gradients, (metrics, statistics) = jax.grad(unequal, has_aux=True)(state.networks["gate"].params)
      state, all_finite, metrics = update(
        state, "gate", gradients, metrics, variables=statistics["gate"], log_name="balance"
      )
      return self._with_statistics(state, {"generator": statistics["generator"]}, all_finite), metrics

    phases = [
      base.Phase("discriminator", train_discriminator, repeats=loss.d_steps),
      base.Phase("generator", train_generator),
    ]
    return [*phases, base.Phase("balance", balance)] if loss.load_balance else phases

  def _draws(self, key) -> Draws:
    cfg, batch = self.experiment.generator, self.experiment.train.batch_size
    return Draws(
      jax.random.normal(random_keys.fold(key, "latents"), (batch, cfg.z_dim)),
      jax.random.uniform(random_keys.fold(key, "gate"), (batch, cfg.generators)),
      jax.random.uniform(random_keys.fold(key, "interpolate"), (batch,)),
    )

  def _generate(self, state, generator_params, gate_params, draws) -> tuple[GeneratorOutput, dict[str, Any]]:
    """A forward pass in training mode: (output, new batch norm statistics {network: {collection: tree}})."""
    params = {"generator": self.unshard("generator", generator_params), "gate": self.unshard("gate", gate_params)}
    variables = join_gate(*({"params": params[name], **state.networks[name].variables} for name in self.sampled))
    z, uniform = self._place_latents((draws.z, draws.uniform))
    temperature = annealing.temperature(self.experiment.loss, state.step)
    with jax.named_scope("generators"):
      out, updated = self.generator.apply(variables, z, uniform, temperature, train=True, mutable=[_STATISTICS])
    generator, gate = split_gate(updated)
    return self._place_images(out), {"generator": generator, "gate": gate}

  def _score(self, params, images):
    with jax.named_scope("discriminator"):
      return base.apply(self.discriminator, {"params": self.unshard("discriminator", params)}, images)

  def _with_statistics(self, state, statistics, all_finite):
    """The state with the batch norm statistics that a pass of the discriminator or balance phase updated, if finite."""
    for name, variables in statistics.items():
      network = state.networks[name]
      keep = lambda new, old: jnp.where(all_finite, new, old)
      state = state.with_network(name, network.replace(variables=jax.tree.map(keep, variables, network.variables)))
    return state

  # ---- on a mesh ---------------------------------------------------------------------------------------------------
  #
  # Only the real images have a sharded batch, and the phases of generator and gate read none. Without these constraints
  # every device would compute the whole batch.

  def _place_latents(self, rows):
    """Places latents [B, ...]: equal on all devices along the generators' mesh axes."""
    return self._constrain(rows, self._latent_axes)

  def _place_stacked(self, maps):
    """Places feature maps of all generators [n, B, ...]: generators along their mesh axes, samples along the others."""
    return self._constrain(maps, self._generator_axes, self._latent_axes)

  def _place_images(self, out):
    """Places the gated images [B, ...] along all axes, for the discriminator."""
    return out.replace(image=self._constrain(out.image, self.layout.rules.batch))

  @property
  def _generator_axes(self):
    return self.layout.expert_axes(self.experiment.generator.generators)

  @property
  def _latent_axes(self):
    return tuple(axis for axis in self.layout.rules.batch if axis not in self._generator_axes)

  def _constrain(self, tree, *axes):
    if self.layout.devices == 1:
      return tree
    return jax.lax.with_sharding_constraint(tree, NamedSharding(self.layout.mesh, PartitionSpec(*axes)))

  # ---- sampling ----------------------------------------------------------------------------------------------------

  def draw_latents(self, key: jax.Array) -> dict[str, jax.Array]:
    cfg = self.experiment.generator
    z, uniform = random_keys.fold(key, "z"), random_keys.fold(key, "uniform")
    return {"z": jax.random.normal(z, (cfg.z_dim,)), "uniform": jax.random.uniform(uniform, (cfg.generators,))}

  def sample(
    self,
    networks: Mapping[str, base.Variables],
    frozen: base.Frozen,
    condition: dict[str, jax.Array],
    latents: dict[str, jax.Array],
    psi: jax.Array | float = 1.0,
  ) -> base.Sample:
    """See `base.System`. The choice is {"generator": int32 [B]}."""
    del frozen, condition, psi
    variables = join_gate(networks["generator"], networks["gate"])
    z, uniform = self._place_latents((latents["z"], latents["uniform"]))
    # A hard gate chooses the same generator at any temperature.
    out = self._place_images(base.apply(self.generator, variables, z, uniform, 1.0, method="sample"))
    return base.Sample(out.image, {"generator": jnp.argmax(out.gate, axis=-1).astype(jnp.int32)})

  def choice_count(self, name: str) -> int:
    del name
    return self.experiment.generator.generators

  @property
  def sampling_batch_size(self) -> int:
    return int(np.clip(2**24 // (self.experiment.generator.generators * self.experiment.resolution**2 * 64), 2, 64))
