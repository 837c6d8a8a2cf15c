"""The Gaussian diffusion process: forward, posterior, reverse, losses, bound.

Sources: Ho et al. 2020 (DDPM), Nichol & Dhariwal 2021 (IDDPM), Song et al. 2020 (DDIM),
Salimans & Ho 2022 (velocity), Chen et al. 2023 ("Analog Bits", self-conditioning). Equation numbers
are IDDPM's unless another paper is named.

Shapes: images are [N, C, ...] in [-1, 1]; timesteps ``t`` are int64 [N] in [0, T), where 0 is the
step with the least noise. A model is any callable ``model(x, t, **model_kwargs)`` that returns
[N, C, ...], or [N, 2C, ...] where the variance is learned; where it tells a channel's labels, K - 1
more (:mod:`improved_diffusion.label_posterior`). The model of a self-conditioned process
also takes ``x_self`` [N, C, ...], its previous prediction of x_0; left out, it stands for zeros.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from improved_diffusion import cli
from improved_diffusion.label_posterior import WEIGHT, LabelPosterior
from improved_diffusion.losses import (
    MIN_SNR_GAMMA,
    SIGMOID_BIAS,
    UNIFORM,
    bits,
    discretized_gaussian_log_likelihood,
    normal_kl,
    squared_error,
    xstart_weights,
)
from improved_diffusion.schedules import betas_for_alpha_bar, get_named_beta_schedule

__all__ = [
    "GaussianDiffusion",
    "LossType",
    "ModelMeanType",
    "ModelVarType",
    "SamplingRun",
    "betas_for_alpha_bar",
    "get_named_beta_schedule",
]

Model = Callable[..., torch.Tensor]
NoiseFn = Callable[[torch.Tensor], torch.Tensor]


class ModelMeanType(enum.Enum):
    """What the model predicts."""

    PREVIOUS_X = enum.auto()  # the mean of x_{t-1}
    START_X = enum.auto()  # x_0
    EPSILON = enum.auto()  # the noise in x_t
    VELOCITY = enum.auto()  # sqrt(alpha_bar) * noise - sqrt(1 - alpha_bar) * x_0


class ModelVarType(enum.Enum):
    """Where the variance of a reverse step comes from."""

    LEARNED = enum.auto()  # the model predicts its logarithm
    FIXED_SMALL = enum.auto()  # the posterior's variance
    FIXED_LARGE = enum.auto()  # beta
    LEARNED_RANGE = enum.auto()  # the model interpolates between these two, Eq. 15


class LossType(enum.Enum):
    """What is minimised."""

    MSE = enum.auto()  # L_simple, Eq. 14; with a learned variance plus one term of L_vlb
    RESCALED_MSE = enum.auto()  # L_hybrid, Eq. 16: that term times T / 1000
    KL = enum.auto()  # one term of L_vlb
    RESCALED_KL = enum.auto()  # an estimate of the whole L_vlb: T times one term

    def is_vb(self) -> bool:
        """Whether the loss is the variational bound alone."""
        return self in (LossType.KL, LossType.RESCALED_KL)


NOT_FROM_NOISE = (
    "--zero_terminal_snr True leaves no signal at the last timestep, where the image cannot be "
    "recovered from the noise that the network predicts; add --predict_v True or "
    "--predict_xstart True"
)
LEARNED_VARIANCES = (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE)
# How many images of a self-conditioned training see a prediction, Chen et al. 2023, section 3.2.
SELF_CONDITIONED_SHARE = 0.5


class SamplingRun:
    """A model in one run of a sampler, shown its last prediction where the process wants that.

    Chen et al. 2023, Algorithm 2. The sampler puts what each evaluation gave into ``prediction``.

    :param self_condition: give ``prediction`` to the model as ``x_self``, zeros in the beginning;
        else call it as it is.
    """

    def __init__(self, model: Model, self_condition: bool) -> None:
        self.model = model
        self.self_condition = self_condition
        self.prediction: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor, t: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if self.self_condition:
            if self.prediction is None:
                # Not left out, so that a compiled model has one form of call.
                self.prediction = torch.zeros_like(x)
            kwargs["x_self"] = self.prediction
        return self.model(x, t, **kwargs)


class GaussianDiffusion:
    """A diffusion process with given betas, and what a model of it predicts and minimises.

    :param betas: [T] variances in (0, 1), or 1 for the last: then x_T is pure noise.
    :param rescale_timesteps: pass timesteps to the model as floats scaled to [0, 1000).
    :param self_condition: show the model its own previous prediction of x_0.
    :param loss_weighting: how the squared error is weighted over the timesteps, one of
        :data:`improved_diffusion.losses.WEIGHTINGS`; ``uniform``: not at all, as L_simple.
    :param min_snr_gamma, sigmoid_bias: see :func:`improved_diffusion.losses.xstart_weights`.
    :param labels: the channel of which the model gives the labels' logits: the first in its place
        among the C of the prediction, the others behind everything else.
    :raises ValueError: for other betas, an unknown weighting or one of the bound alone, and for
        noise prediction where x_T is pure noise.
    """

    def __init__(
        self,
        *,
        betas: Sequence[float] | np.ndarray,
        model_mean_type: ModelMeanType,
        model_var_type: ModelVarType,
        loss_type: LossType,
        rescale_timesteps: bool = False,
        self_condition: bool = False,
        loss_weighting: str = UNIFORM,
        min_snr_gamma: float = MIN_SNR_GAMMA,
        sigmoid_bias: float = SIGMOID_BIAS,
        labels: LabelPosterior | None = None,
    ) -> None:
        betas = np.array(betas, dtype=np.float64)
        if betas.ndim != 1 or betas.size == 0 or (betas <= 0).any() or (betas > 1).any():
            raise ValueError("betas must be a non-empty row of numbers in (0, 1]")
        if (betas[:-1] == 1).any():
            raise ValueError("of the betas only the last may be 1, which leaves no signal")
        if betas[-1] == 1 and model_mean_type is ModelMeanType.EPSILON:
            raise ValueError(NOT_FROM_NOISE)
        self.model_mean_type = model_mean_type
        self.model_var_type = model_var_type
        self.loss_type = loss_type
        self.rescale_timesteps = rescale_timesteps
        self.self_condition = self_condition
        self.labels = labels
        self.num_timesteps = len(betas)

        self.betas = betas
        alphas = 1.0 - betas
        bar = np.cumprod(alphas)
        self.alphas_cumprod = bar
        self.alphas_cumprod_prev = np.concatenate([[1.0], bar[:-1]])
        self.alphas_cumprod_next = np.concatenate([bar[1:], [0.0]])

        # x_t = sqrt(bar) x_0 + sqrt(1 - bar) noise, Eq. 9, and its inverses.
        self.sqrt_alphas_cumprod = np.sqrt(bar)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1.0 - bar)
        self.log_one_minus_alphas_cumprod = np.log(1.0 - bar)
        with np.errstate(divide="ignore"):  # infinite without signal, where only noise needs them
            self.sqrt_recip_alphas_cumprod = np.sqrt(1.0 / bar)
            self.sqrt_recipm1_alphas_cumprod = np.sqrt(1.0 / bar - 1.0)

        # The posterior q(x_{t-1} | x_t, x_0), Eqs. 10 and 11.
        self.posterior_variance = betas * (1.0 - self.alphas_cumprod_prev) / (1.0 - bar)
        self.posterior_mean_coef1 = betas * np.sqrt(self.alphas_cumprod_prev) / (1.0 - bar)
        self.posterior_mean_coef2 = (1.0 - self.alphas_cumprod_prev) * np.sqrt(alphas) / (1.0 - bar)

        # The posterior's variance is 0 at t = 0; its logarithm takes the value of the next step.
        next_variance = self.posterior_variance[1] if self.num_timesteps > 1 else betas[0]
        positive = np.concatenate([[next_variance], self.posterior_variance[1:]])
        self.posterior_log_variance_clipped = np.log(positive)
        # Ho et al. 2020, section 3.2: beta, with the same value at t = 0.
        self.fixed_large_variance = np.concatenate([[next_variance], betas[1:]])
        self.fixed_large_log_variance = np.log(self.fixed_large_variance)
        self.log_betas = np.log(betas)

        self.loss_weights: np.ndarray | None = None
        if loss_weighting != UNIFORM:
            self.loss_weights = self._loss_weights(loss_weighting, min_snr_gamma, sigmoid_bias)

        self._tables: dict[tuple[str, torch.device], torch.Tensor] = {}

    def _loss_weights(self, weighting: str, gamma: float, sigmoid_bias: float) -> np.ndarray:
        """Weights [T] of the squared error of what the model predicts."""
        if self.loss_type.is_vb():
            raise ValueError(
                f"--loss_weighting {weighting} weights the squared error, which is no part of the "
                "loss with --use_kl True; leave one of the two out"
            )
        assert self.model_mean_type is not ModelMeanType.PREVIOUS_X
        snr = self.alphas_cumprod / (1.0 - self.alphas_cumprod)
        weights = xstart_weights(weighting, snr, gamma, sigmoid_bias)
        if weights[-1] == 0:  # without signal; the step would never be trained
            weights[-1] = weights[-2:][0]
        match self.model_mean_type:
            case ModelMeanType.EPSILON:
                return weights / snr
            case ModelMeanType.VELOCITY:
                return weights / (snr + 1.0)
        return weights

    def _at(self, name: str, t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Entries ``t`` of the table ``name``, in ``like``'s type, shaped to broadcast against it.

        A table is copied to a device once and then stays there.
        """
        key = (name, t.device)
        if key not in self._tables:
            self._tables[key] = torch.from_numpy(getattr(self, name)).to(t.device)
        return self._tables[key][t].to(like.dtype).reshape(-1, *[1] * (like.dim() - 1))

    def model_timesteps(self, t: torch.Tensor) -> torch.Tensor:
        """What a model is told of the timesteps ``t``: ``t`` itself or, rescaled, floats."""
        if self.rescale_timesteps:
            return t.float() * (1000.0 / self.num_timesteps)
        return t

    def _evaluate(
        self, model: Model, x: torch.Tensor, t: torch.Tensor, model_kwargs: dict[str, Any] | None
    ) -> torch.Tensor:
        assert t.shape == (x.shape[0],)
        return model(x, self.model_timesteps(t), **(model_kwargs or {}))

    # Forward process

    def q_mean_variance(
        self, x_start: torch.Tensor, t: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean, variance and log-variance of q(x_t | x_0), Eq. 8, each of ``x_start``'s shape."""
        mean = self._at("sqrt_alphas_cumprod", t, x_start) * x_start
        log_variance = self._at("log_one_minus_alphas_cumprod", t, x_start).expand_as(x_start)
        return mean, log_variance.exp(), log_variance

    def q_sample(
        self, x_start: torch.Tensor, t: torch.Tensor, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Draw x_t from q(x_t | x_0), Eq. 9; ``noise`` (standard normal) is drawn if not given."""
        if noise is None:
            noise = torch.randn_like(x_start)
        assert noise.shape == x_start.shape
        return (
            self._at("sqrt_alphas_cumprod", t, x_start) * x_start
            + self._at("sqrt_one_minus_alphas_cumprod", t, x_start) * noise
        )

    def q_posterior_mean_variance(
        self, x_start: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean, variance and log-variance of q(x_{t-1} | x_t, x_0), Eqs. 10 to 12.

        The log-variance is finite at t = 0 too, where the variance is 0.
        """
        assert x_start.shape == x_t.shape
        mean = (
            self._at("posterior_mean_coef1", t, x_t) * x_start
            + self._at("posterior_mean_coef2", t, x_t) * x_t
        )
        variance = self._at("posterior_variance", t, x_t).expand_as(x_t)
        log_variance = self._at("posterior_log_variance_clipped", t, x_t).expand_as(x_t)
        return mean, variance, log_variance

    # What the model predicts

    def predict_xstart_from_eps(
        self, x_t: torch.Tensor, t: torch.Tensor, eps: torch.Tensor
    ) -> torch.Tensor:
        """x_0 from x_t and its noise: Eq. 9 solved for x_0."""
        return (
            self._at("sqrt_recip_alphas_cumprod", t, x_t) * x_t
            - self._at("sqrt_recipm1_alphas_cumprod", t, x_t) * eps
        )

    def predict_eps_from_xstart(
        self, x_t: torch.Tensor, t: torch.Tensor, x_start: torch.Tensor
    ) -> torch.Tensor:
        """The noise in x_t from x_0: Eq. 9 solved for the noise."""
        signal = self._at("sqrt_alphas_cumprod", t, x_t) * x_start
        return (x_t - signal) / self._at("sqrt_one_minus_alphas_cumprod", t, x_t)

    def velocity(self, x_start: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """v = sqrt(bar) noise - sqrt(1 - bar) x_0, Salimans & Ho 2022, section 4."""
        return (
            self._at("sqrt_alphas_cumprod", t, x_start) * noise
            - self._at("sqrt_one_minus_alphas_cumprod", t, x_start) * x_start
        )

    def predict_xstart_from_velocity(
        self, x_t: torch.Tensor, t: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """x_0 = sqrt(bar) x_t - sqrt(1 - bar) v, Salimans & Ho 2022, appendix D."""
        return (
            self._at("sqrt_alphas_cumprod", t, x_t) * x_t
            - self._at("sqrt_one_minus_alphas_cumprod", t, x_t) * v
        )

    def predict_xstart_from_xprev(
        self, x_t: torch.Tensor, t: torch.Tensor, xprev: torch.Tensor
    ) -> torch.Tensor:
        """x_0 from the posterior's mean ``xprev``: Eq. 11 solved for x_0."""
        return (xprev - self._at("posterior_mean_coef2", t, x_t) * x_t) / self._at(
            "posterior_mean_coef1", t, x_t
        )

    def _training_target(
        self, x_start: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        match self.model_mean_type:
            case ModelMeanType.EPSILON:
                return noise
            case ModelMeanType.START_X:
                return x_start
            case ModelMeanType.VELOCITY:
                return self.velocity(x_start, t, noise)
            case ModelMeanType.PREVIOUS_X:
                return self.q_posterior_mean_variance(x_start, x_t, t)[0]

    def _split_output(
        self, output: torch.Tensor, x: torch.Tensor, t: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """The model's prediction of the mean and, where it gives them, variance and labels.

        The labels' are their log-probabilities, see :meth:`LabelPosterior.log_probabilities`.
        """
        channels = x.shape[1]
        variances = channels if self.model_var_type in LEARNED_VARIANCES else 0
        extra = self.labels.extra if self.labels else 0
        assert output.shape == (x.shape[0], channels + variances + extra, *x.shape[2:])
        prediction, variance, logits = output.split([channels, variances, extra], dim=1)
        log_probabilities = None
        if self.labels:
            before, first, after = self.labels.split(prediction)
            x_t = self.labels.split(x)[1]
            alpha = self._at("sqrt_alphas_cumprod", t, x_t)
            sigma = self._at("sqrt_one_minus_alphas_cumprod", t, x_t)
            log_probabilities = self.labels.log_probabilities(
                torch.cat([first, logits], dim=1), x_t, alpha, sigma
            )
            x_start = self.labels.mean(log_probabilities)
            noise = self.predict_eps_from_xstart(x_t, t, x_start)
            # What a model would predict that took this for x_0.
            mask = self._training_target(x_start, x_t, t, noise)
            prediction = torch.cat([before, mask, after], dim=1)
        return prediction, variance if variances else None, log_probabilities

    def _reverse_distribution(
        self,
        prediction: torch.Tensor,
        variance_values: torch.Tensor | None,
        x: torch.Tensor,
        t: torch.Tensor,
        clip_denoised: bool,
        denoised_fn: NoiseFn | None = None,
    ) -> dict[str, torch.Tensor]:
        """p(x_{t-1} | x_t) from the two parts of the model's output."""
        match self.model_var_type:
            case ModelVarType.LEARNED:
                log_variance = variance_values
            case ModelVarType.LEARNED_RANGE:
                # Eq. 15, for values in [-1, 1] instead of [0, 1].
                share = (variance_values + 1.0) / 2.0
                small = self._at("posterior_log_variance_clipped", t, x)
                log_variance = share * self._at("log_betas", t, x) + (1.0 - share) * small
            case ModelVarType.FIXED_SMALL:
                log_variance = self._at("posterior_log_variance_clipped", t, x).expand_as(x)
            case ModelVarType.FIXED_LARGE:
                log_variance = self._at("fixed_large_log_variance", t, x).expand_as(x)
        if self.model_var_type is ModelVarType.FIXED_SMALL:
            variance = self._at("posterior_variance", t, x).expand_as(x)
        else:
            variance = log_variance.exp()

        x_start = self._xstart(prediction, x, t, clip_denoised, denoised_fn)
        if self.model_mean_type is ModelMeanType.PREVIOUS_X:
            mean = prediction
        else:
            mean = self.q_posterior_mean_variance(x_start, x, t)[0]
        return {
            "mean": mean,
            "variance": variance,
            "log_variance": log_variance,
            "pred_xstart": x_start,
        }

    def _xstart(
        self,
        prediction: torch.Tensor,
        x: torch.Tensor,
        t: torch.Tensor,
        clip_denoised: bool,
        denoised_fn: NoiseFn | None = None,
    ) -> torch.Tensor:
        """x_0 from what the model predicts of the mean."""
        match self.model_mean_type:
            case ModelMeanType.EPSILON:
                x_start = self.predict_xstart_from_eps(x, t, prediction)
            case ModelMeanType.START_X:
                x_start = prediction
            case ModelMeanType.VELOCITY:
                x_start = self.predict_xstart_from_velocity(x, t, prediction)
            case ModelMeanType.PREVIOUS_X:
                x_start = self.predict_xstart_from_xprev(x, t, prediction)
        if denoised_fn is not None:
            x_start = denoised_fn(x_start)
        return x_start.clamp(-1.0, 1.0) if clip_denoised else x_start

    def predict_xstart(
        self,
        model: Model,
        x: torch.Tensor,
        t: torch.Tensor,
        clip_denoised: bool = True,
        model_kwargs: dict[str, Any] | None = None,
    ) -> torch.Tensor:
        """The model's prediction of x_0, like ``x``, whatever it predicts and learns.

        :param clip_denoised: limit it to [-1, 1].
        """
        prediction, _, _ = self._split_output(self._evaluate(model, x, t, model_kwargs), x, t)
        return self._xstart(prediction, x, t, clip_denoised)

    def p_mean_variance(
        self,
        model: Model,
        x: torch.Tensor,
        t: torch.Tensor,
        clip_denoised: bool = True,
        denoised_fn: NoiseFn | None = None,
        model_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, torch.Tensor]:
        """The model's p(x_{t-1} | x_t) and its prediction of x_0.

        :param clip_denoised: limit the predicted x_0 to [-1, 1].
        :param denoised_fn: applied to the predicted x_0 before that.
        :return: ``mean``, ``variance``, ``log_variance`` and ``pred_xstart``, each like ``x``.
        """
        output = self._evaluate(model, x, t, model_kwargs)
        prediction, variance_values, _ = self._split_output(output, x, t)
        return self._reverse_distribution(
            prediction, variance_values, x, t, clip_denoised, denoised_fn
        )

    # Reverse process

    def p_sample(
        self,
        model: Model,
        x: torch.Tensor,
        t: torch.Tensor,
        clip_denoised: bool = True,
        denoised_fn: NoiseFn | None = None,
        model_kwargs: dict[str, Any] | None = None,
        noise_fn: NoiseFn = torch.randn_like,
    ) -> dict[str, torch.Tensor]:
        """One ancestral step, Ho et al. 2020, Algorithm 2: draw x_{t-1}.

        :param noise_fn: draws standard normal noise of its argument's shape.
        :return: ``sample`` and ``pred_xstart``.
        """
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        log_variance = out["log_variance"]
        if (
            self.model_mean_type is ModelMeanType.START_X
            and self.model_var_type is ModelVarType.LEARNED_RANGE
        ):
            # Images in [-1, 1] leave a step no more variance than beta. The bound wants more, as
            # much as the network's error of x_0, which at low noise is far larger; drawn as noise
            # it would stay in the image. With noise prediction that error is small there.
            small = self._at("posterior_log_variance_clipped", t, x)
            log_variance = log_variance.clamp(small, self._at("log_betas", t, x))
        noise = noise_fn(x) * _unless_first(t, x)
        sample = out["mean"] + torch.exp(0.5 * log_variance) * noise
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    def ddim_sample(
        self,
        model: Model,
        x: torch.Tensor,
        t: torch.Tensor,
        clip_denoised: bool = True,
        denoised_fn: NoiseFn | None = None,
        model_kwargs: dict[str, Any] | None = None,
        eta: float = 0.0,
        noise_fn: NoiseFn = torch.randn_like,
    ) -> dict[str, torch.Tensor]:
        """One DDIM step, Song et al. 2020, Eq. 12; ``eta`` 0 is deterministic, 1 is ancestral.

        :return: ``sample`` and ``pred_xstart``.
        """
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        # From the clipped x_0, so that the two belong together.
        eps = self.predict_eps_from_xstart(x, t, out["pred_xstart"])
        bar = self._at("alphas_cumprod", t, x)
        bar_prev = self._at("alphas_cumprod_prev", t, x)
        # Song et al. 2020, Eq. 16.
        sigma = eta * ((1 - bar_prev) / (1 - bar)).sqrt() * (1 - bar / bar_prev).sqrt()
        # What sigma leaves of the noise; rounding may go below 0 where it is to leave none.
        left = (1 - bar_prev - sigma**2).clamp(min=0).sqrt()
        mean = out["pred_xstart"] * bar_prev.sqrt() + left * eps
        sample = mean
        if eta:
            sample = mean + sigma * noise_fn(x) * _unless_first(t, x)
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    def ddim_reverse_sample(
        self,
        model: Model,
        x: torch.Tensor,
        t: torch.Tensor,
        clip_denoised: bool = True,
        denoised_fn: NoiseFn | None = None,
        model_kwargs: dict[str, Any] | None = None,
        eta: float = 0.0,
    ) -> dict[str, torch.Tensor]:
        """One deterministic DDIM step towards more noise: x_{t+1} from x_t.

        :return: ``sample`` and ``pred_xstart``.
        """
        if eta != 0.0:
            raise ValueError(f"only the deterministic DDIM step (eta 0) has a reverse, not {eta}")
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        eps = self.predict_eps_from_xstart(x, t, out["pred_xstart"])
        bar_next = self._at("alphas_cumprod_next", t, x)
        sample = out["pred_xstart"] * bar_next.sqrt() + (1 - bar_next).sqrt() * eps
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    def p_sample_loop(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Draw samples by ancestral steps from noise to image.

        Takes the arguments of :meth:`p_sample_loop_progressive` and returns the last sample,
        [N, C, ...], about in [-1, 1].
        """
        return _last(self.p_sample_loop_progressive(*args, **kwargs))

    def p_sample_loop_progressive(
        self,
        model: Model,
        shape: Sequence[int],
        noise: torch.Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: NoiseFn | None = None,
        model_kwargs: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        noise_fn: NoiseFn = torch.randn_like,
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the result of :meth:`p_sample` at every step, from the noisiest.

        :param shape: [N, C, ...] of the samples.
        :param noise: x_T; drawn by ``noise_fn`` if not given.
        :param device: by default that of the model's parameters.
        :param progress: show a progress bar.
        :param noise_fn: draws the noise of the start and of every step.
        """
        run = SamplingRun(model, self.self_condition)
        yield from self._loop(
            lambda x, t: self.p_sample(
                run, x, t, clip_denoised, denoised_fn, model_kwargs, noise_fn=noise_fn
            ),
            *(run, shape, noise, device, progress, noise_fn),
        )

    def ddim_sample_loop(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Draw samples by DDIM steps from noise to image.

        Takes the arguments of :meth:`ddim_sample_loop_progressive` and returns the last sample.
        """
        return _last(self.ddim_sample_loop_progressive(*args, **kwargs))

    def ddim_sample_loop_progressive(
        self,
        model: Model,
        shape: Sequence[int],
        noise: torch.Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: NoiseFn | None = None,
        model_kwargs: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
        noise_fn: NoiseFn = torch.randn_like,
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the result of :meth:`ddim_sample` at every step; arguments as of
        :meth:`p_sample_loop_progressive`."""
        run = SamplingRun(model, self.self_condition)
        yield from self._loop(
            lambda x, t: self.ddim_sample(
                run, x, t, clip_denoised, denoised_fn, model_kwargs, eta=eta, noise_fn=noise_fn
            ),
            *(run, shape, noise, device, progress, noise_fn),
        )

    def _loop(
        self,
        step: Callable[[torch.Tensor, torch.Tensor], dict[str, torch.Tensor]],
        run: SamplingRun,
        shape: Sequence[int],
        noise: torch.Tensor | None,
        device: torch.device | str | None,
        progress: bool,
        noise_fn: NoiseFn,
    ) -> Iterator[dict[str, torch.Tensor]]:
        if device is None:
            device = noise.device if noise is not None else next(run.model.parameters()).device
        x = noise_fn(torch.empty(*shape, device=device)) if noise is None else noise
        steps: Any = range(self.num_timesteps - 1, -1, -1)
        if progress:
            steps = cli.progress(steps, total=self.num_timesteps, desc="sampling", unit="step")
        for i in steps:
            t = torch.full((shape[0],), i, device=device, dtype=torch.int64)
            with torch.no_grad():
                out = step(x, t)
            run.prediction = out["pred_xstart"]
            yield out
            x = out["sample"]

    # Losses and bound

    def training_losses(
        self,
        model: Model,
        x_start: torch.Tensor,
        t: torch.Tensor,
        model_kwargs: dict[str, Any] | None = None,
        noise: torch.Tensor | None = None,
        channel_names: Sequence[str] = (),
        conditioned: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """The loss of every sample at its timestep.

        :param noise: the noise to add; drawn if not given.
        :param channel_names: C names; the result then also has ``mse_<name>`` [N], the squared
            error of each channel, whose mean over the channels is ``mse``.
        :param conditioned: of a self-conditioned process: bool [N], for which samples the model
            sees its own prediction; drawn if not given.
        :return: ``loss`` [N]; for the squared-error losses also ``mse`` [N], which is never
            weighted, and, where the variance is learned, ``vb`` [N], the term of the bound that
            trains it; where the model tells labels ``ce`` [N], their cross-entropy in nats, which
            times :data:`~improved_diffusion.label_posterior.WEIGHT` stands in the loss for the
            squared error of their channel.
        """
        if noise is None:
            noise = torch.randn_like(x_start)
        x_t = self.q_sample(x_start, t, noise)
        if self.self_condition:
            x_self = self._first_prediction(model, x_t, t, model_kwargs, conditioned)
            model_kwargs = {**(model_kwargs or {}), "x_self": x_self}
        output = self._evaluate(model, x_t, t, model_kwargs)
        prediction, variance_values, log_labels = self._split_output(output, x_t, t)

        if self.loss_type.is_vb():
            reverse = self._reverse_distribution(prediction, variance_values, x_t, t, False)
            loss = self._bound_term(reverse, x_start, x_t, t)
            return {"loss": loss * self.num_timesteps if self._rescales() else loss}

        target = self._training_target(x_start, x_t, t, noise)
        terms = {"mse": squared_error(prediction, target)}
        if variance_values is not None:
            # The bound trains the variance only: its gradient stops at the mean (section 3.1).
            reverse = self._reverse_distribution(
                prediction.detach(), variance_values, x_t, t, False
            )
            terms["vb"] = self._bound_term(reverse, x_start, x_t, t)
            if self._rescales():
                terms["vb"] = terms["vb"] * (self.num_timesteps / 1000.0)
        loss = terms["mse"]
        if log_labels is not None:
            # The labels learn from their cross-entropy in place of their channel's squared error.
            before, _, after = self.labels.split(prediction)
            own = self.labels.split(target)[1]
            others = squared_error(torch.cat([before, own, after], dim=1), target)
            terms["ce"] = self.labels.cross_entropy(log_labels, self.labels.split(x_start)[1])
            loss = others + WEIGHT * terms["ce"] / x_start.shape[1]
        if self.loss_weights is not None:
            loss = self._at("loss_weights", t, loss) * loss
        terms["loss"] = loss + terms["vb"] if "vb" in terms else loss
        for channel, name in enumerate(channel_names):
            own = slice(channel, channel + 1)
            terms[f"mse_{name}"] = squared_error(prediction[:, own].detach(), target[:, own])
        return terms

    def draw_conditioned(self, n: int) -> torch.Tensor:
        """Draw which of ``n`` samples see a prediction in training: bool [N].

        On the CPU, where counting them does not wait for a GPU.
        """
        return torch.rand(n) < SELF_CONDITIONED_SHARE

    @torch.no_grad()
    def _first_prediction(
        self,
        model: Model,
        x_t: torch.Tensor,
        t: torch.Tensor,
        model_kwargs: dict[str, Any] | None,
        conditioned: torch.Tensor | None,
    ) -> torch.Tensor:
        """What the model is shown of x_0 in training, Chen et al. 2023, Algorithm 1, like ``x_t``.

        For the ``conditioned`` samples what it predicts in a first pass, in [-1, 1], that has no
        gradient; for the others zeros.
        """
        if conditioned is None:
            conditioned = self.draw_conditioned(len(x_t))
        x_self = torch.zeros_like(x_t)
        rows = conditioned.nonzero().flatten().to(x_t.device)
        if len(rows):
            kwargs = {name: value[rows] for name, value in (model_kwargs or {}).items()}
            kwargs["x_self"] = x_self[rows]
            x_self[rows] = self.predict_xstart(model, x_t[rows], t[rows], model_kwargs=kwargs)
        return x_self

    def _rescales(self) -> bool:
        return self.loss_type in (LossType.RESCALED_MSE, LossType.RESCALED_KL)

    def _bound_term(
        self,
        reverse: dict[str, torch.Tensor],
        x_start: torch.Tensor,
        x_t: torch.Tensor,
        t: torch.Tensor,
    ) -> torch.Tensor:
        """One term of the variational bound, Eqs. 4 to 6, [N] bits per dimension.

        At t = 0 the likelihood of the 8-bit image, elsewhere the divergence of the model's step
        from the posterior.
        """
        true_mean, _, true_log_variance = self.q_posterior_mean_variance(x_start, x_t, t)
        kl = bits(normal_kl(true_mean, true_log_variance, reverse["mean"], reverse["log_variance"]))
        log_likelihood = discretized_gaussian_log_likelihood(
            x_start, means=reverse["mean"], log_scales=0.5 * reverse["log_variance"]
        )
        return torch.where(t == 0, -bits(log_likelihood), kl)

    def vb_terms_bpd(
        self,
        model: Model,
        x_start: torch.Tensor,
        x_t: torch.Tensor,
        t: torch.Tensor,
        clip_denoised: bool = True,
        model_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, torch.Tensor]:
        """The bound's term at ``t`` for each sample.

        The bound has no previous prediction: a self-conditioned model sees zeros.

        :return: ``output`` [N] in bits per dimension, and ``pred_xstart`` like ``x_t``.
        """
        reverse = self.p_mean_variance(
            model, x_t, t, clip_denoised=clip_denoised, model_kwargs=model_kwargs
        )
        output = self._bound_term(reverse, x_start, x_t, t)
        return {"output": output, "pred_xstart": reverse["pred_xstart"]}

    def prior_bpd(self, x_start: torch.Tensor) -> torch.Tensor:
        """The bound's last term, Eq. 7: how far x_T is from the prior, [N] bits per dimension."""
        last = torch.full((x_start.shape[0],), self.num_timesteps - 1, device=x_start.device)
        mean, _, log_variance = self.q_mean_variance(x_start, last)
        return bits(normal_kl(mean, log_variance, 0.0, 0.0))

    @torch.no_grad()
    def calc_bpd_loop(
        self,
        model: Model,
        x_start: torch.Tensor,
        clip_denoised: bool = True,
        model_kwargs: dict[str, Any] | None = None,
        noise_fn: NoiseFn = torch.randn_like,
    ) -> dict[str, torch.Tensor]:
        """The whole variational bound, one draw of the noise for every timestep.

        A self-conditioned model sees zeros, as in :meth:`vb_terms_bpd`.

        :param noise_fn: draws standard normal noise of its argument's shape.
        :return: ``total_bpd`` [N], ``prior_bpd`` [N], and from the noisiest step on ``vb``,
            ``xstart_mse`` and ``mse`` (of the noise), each [N, T].
        """
        columns: dict[str, list[torch.Tensor]] = {"vb": [], "xstart_mse": [], "mse": []}
        for i in range(self.num_timesteps - 1, -1, -1):
            t = torch.full((x_start.shape[0],), i, device=x_start.device)
            noise = noise_fn(x_start)
            x_t = self.q_sample(x_start, t, noise)
            out = self.vb_terms_bpd(model, x_start, x_t, t, clip_denoised, model_kwargs)
            eps = self.predict_eps_from_xstart(x_t, t, out["pred_xstart"])
            columns["vb"].append(out["output"])
            columns["xstart_mse"].append(squared_error(out["pred_xstart"], x_start))
            columns["mse"].append(squared_error(eps, noise))
        result = {name: torch.stack(values, dim=1) for name, values in columns.items()}
        result["prior_bpd"] = self.prior_bpd(x_start)
        result["total_bpd"] = result["vb"].sum(dim=1) + result["prior_bpd"]
        return result


def _unless_first(t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """0 where ``t`` is 0, else 1: the last step to the image adds no noise."""
    return (t != 0).to(like.dtype).reshape(-1, *[1] * (like.dim() - 1))


def _last(outputs: Iterator[dict[str, torch.Tensor]]) -> torch.Tensor:
    out: dict[str, torch.Tensor] = {}
    for out in outputs:  # noqa: B007
        pass
    return out["sample"]
