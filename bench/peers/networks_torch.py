"""LeNet-5-Caffe and 3Conv3FC in PyTorch under the posteriors of Bayesian incremental learning, and a perceptron under
Bayesian gradient descent, as a good PyTorch user would write them: the peers of Baton's training step and prediction.

    ft   the plain network                                       Plain
    ffg  fully factorised Gaussian, local reparameterization     GaussianLayer
    cfg  convolutions with a Cholesky factor for each filter     CholeskyConv; dense layers as ffg
         and channel, by draws of the weights
    mnf  w = z mu + sigma e, z by a normalizing flow, with the   MultiplicativeLayer
         bound joint in w and z

The prior of every posterior is a posterior of the same form that was handed on.

    bgd  a plain network whose weights and biases are drawn anew for   BayesianGradientDescent
         each of K backward passes a step (Zeno et al. 2018)
"""
import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

VARIANCE_FLOOR = 1e-8
FLOW_STEPS, FLOW_HIDDEN = 2, 50
INITIAL_LOG_STD, INITIAL_Z_LOG_STD = -4.0, math.log(0.1)


class Architecture:
    """Convolutions (out, in, kernel, padding), each followed by max pooling of `window` at stride 2, then dense layers
    (out, in). N_t is the size of one tenth of the training set, beta the weight of the KL (Kochurov et al. 2018)."""

    def __init__(self, image, convolutions, window, dense, stage_examples, beta):
        self.image, self.convolutions, self.window, self.dense = image, convolutions, window, dense
        self.kl_weight = beta / stage_examples
        self.classes = dense[-1][0]

    def weights(self):
        """(shape, padding) of every layer's weights; dense layers have no padding."""
        shapes = [((out, channels, kernel, kernel), padding) for out, channels, kernel, padding in self.convolutions]
        return shapes + [(shape, None) for shape in self.dense]


ARCHITECTURES = {
    "lenet5": Architecture((1, 28, 28), [(20, 1, 5, 0), (50, 20, 5, 0)], 2, [(500, 800), (10, 500)], 6000, 1.0),
    "3conv3fc": Architecture((3, 32, 32), [(32, 3, 5, 2), (64, 32, 5, 2), (128, 64, 5, 2)], 3,
                             [(1000, 1152), (1000, 1000), (10, 1000)], 5000, 0.05),
    "mlp1200": Architecture((1, 28, 28), [], 0, [(1200, 784), (1200, 1200), (10, 1200)], 5000, 1.0),
}


def normal_weights(shape):
    return torch.randn(shape) * math.sqrt(2 / math.prod(shape[1:]))


def sample(mean, variance):
    return torch.addcmul(mean, (variance + VARIANCE_FLOOR).sqrt(), torch.randn_like(mean))


def gaussian_kl(mean, log_std, variance, prior_mean, prior_log_std, prior_precision):
    difference = mean - prior_mean
    scaled = (variance + difference * difference) * prior_precision
    return (prior_log_std - log_std + 0.5 * scaled).sum() - 0.5 * variance.numel()


class Plain(nn.Module):
    def __init__(self, architecture):
        super().__init__()
        self.architecture = architecture
        self.convolutions = nn.ModuleList(nn.Conv2d(channels, out, kernel, padding=padding)
                                          for out, channels, kernel, padding in architecture.convolutions)
        self.dense = nn.ModuleList(nn.Linear(inputs, out) for out, inputs in architecture.dense)

    def forward(self, x):
        for layer in self.convolutions:
            x = F.relu(F.max_pool2d(layer(x), self.architecture.window, 2), inplace=True)
        x = x.flatten(1)
        for layer in self.dense[:-1]:
            x = F.relu(layer(x), inplace=True)
        return self.dense[-1](x)

    def loss(self, x, labels):
        return F.cross_entropy(self(x), labels)


class BayesianGradientDescent:
    """The posterior N(mu, sigma^2) of every weight and bias of a network, and its closed-form step: with e ~ N(0, 1),
    theta = mu + sigma e and g the gradient of the batch's summed loss,

        mu <- mu - eta sigma^2 E[g],   sigma <- sigma (sqrt(1 + x^2) - x),   x = sigma E[g e] / 2

    where E is the mean over K draws. The gradients are of the mean loss, so they count once an example."""

    def __init__(self, network, draws=10, sigma=0.04, eta=1.0):
        self.network, self.draws, self.eta = network, draws, eta
        for layer in network.dense:
            nn.init.xavier_normal_(layer.weight)
            nn.init.normal_(layer.bias, std=math.sqrt(2 / (1 + layer.out_features)))
        self.parameters = list(network.parameters())
        self.means = [p.detach().clone() for p in self.parameters]
        self.stds = [torch.full_like(mean, sigma) for mean in self.means]
        self.noises, self.grad_sums, self.grad_noise_sums = (
            [torch.zeros_like(mean) for mean in self.means] for _ in range(3))

    @torch.no_grad()
    def draw(self):
        for parameter, mean, std, noise in zip(self.parameters, self.means, self.stds, self.noises):
            torch.addcmul(mean, std, noise.normal_(), out=parameter.data)
            parameter.grad = None

    @torch.no_grad()
    def accumulate(self, examples):
        for parameter, noise, grad_sum, grad_noise_sum in zip(self.parameters, self.noises, self.grad_sums,
                                                              self.grad_noise_sums):
            grad_sum.add_(parameter.grad, alpha=examples)
            grad_noise_sum.addcmul_(parameter.grad, noise, value=examples)

    @torch.no_grad()
    def update(self):
        for mean, std, grad_sum, grad_noise_sum in zip(self.means, self.stds, self.grad_sums, self.grad_noise_sums):
            mean.addcmul_(std * std, grad_sum, value=-self.eta / self.draws)
            x = grad_noise_sum.mul_(std).mul_(0.5 / self.draws)
            std.mul_((x * x).add_(1).sqrt_().sub_(x))
            grad_sum.zero_()
            grad_noise_sum.zero_()

    def step(self, images, labels, loss_of):
        """The mean loss over the draws; loss_of is the network's loss, compiled or not."""
        total = torch.zeros((), device=images.device)
        for _ in range(self.draws):
            self.draw()
            loss = loss_of(images, labels)
            loss.backward()
            self.accumulate(images.shape[0])
            total += loss.detach()
        self.update()
        return total / self.draws


class GaussianLayer(nn.Module):
    """Independent Gaussians over the weights and biases of a convolution or a dense layer. What a step computes once,
    for the forward pass and the KL, is begin()'s; here the variances."""

    def __init__(self, shape, padding):
        super().__init__()
        self.padding = padding
        self.weight_mean = nn.Parameter(normal_weights(shape))
        self.weight_log_std = nn.Parameter(torch.full(shape, INITIAL_LOG_STD))
        self.bias_mean = nn.Parameter(torch.zeros(shape[0]))
        self.bias_log_std = nn.Parameter(torch.full(shape[:1], INITIAL_LOG_STD))
        for name in ("weight", "bias"):
            like = getattr(self, f"{name}_mean")
            for part in ("mean", "log_std", "precision"):
                self.register_buffer(f"{name}_prior_{part}", torch.empty_like(like))
        self.hand_over()

    @torch.no_grad()
    def hand_over(self):
        """The posterior becomes the prior."""
        for name in ("weight", "bias"):
            getattr(self, f"{name}_prior_mean").copy_(getattr(self, f"{name}_mean"))
            getattr(self, f"{name}_prior_log_std").copy_(getattr(self, f"{name}_log_std"))
            getattr(self, f"{name}_prior_precision").copy_((-2 * getattr(self, f"{name}_log_std")).exp())

    def apply_weights(self, x, weight, bias):
        return F.linear(x, weight, bias) if self.padding is None else F.conv2d(x, weight, bias, padding=self.padding)

    def begin(self):
        return (2 * self.weight_log_std).exp(), (2 * self.bias_log_std).exp()

    def moments(self, x, variances):
        mean = self.apply_weights(x, self.weight_mean, self.bias_mean)
        return mean, self.apply_weights(x * x, *variances)

    def forward(self, x, variances):
        """Local reparameterization: noise for every example, output and position."""
        return sample(*self.moments(x, variances))

    def bias_kl(self, variance):
        return gaussian_kl(self.bias_mean, self.bias_log_std, variance, self.bias_prior_mean, self.bias_prior_log_std,
                           self.bias_prior_precision)

    def kl(self, variances):
        return self.bias_kl(variances[1]) + gaussian_kl(
            self.weight_mean, self.weight_log_std, variances[0], self.weight_prior_mean, self.weight_prior_log_std,
            self.weight_prior_precision)

    def draw(self, deviations):
        """One draw of all weights and biases."""
        weight_std, bias_std = deviations
        return (torch.addcmul(self.weight_mean, weight_std, torch.randn_like(weight_std)),
                torch.addcmul(self.bias_mean, bias_std, torch.randn_like(bias_std)))


class CholeskyConv(nn.Module):
    """The kernel of each filter and channel is N(mu, L L^T), its k x k weights one vector of d. A factor's parameters
    are the logarithms of the diagonal and, packed in rows, L_ij / L_ii below it. One draw of the weights a step."""

    def __init__(self, shape, padding):
        super().__init__()
        self.shape, self.padding = shape, padding
        blocks, d = shape[0] * shape[1], shape[2] * shape[3]
        self.weight_mean = nn.Parameter(normal_weights(shape).view(blocks, d))
        self.log_diagonal = nn.Parameter(torch.full((blocks, d), INITIAL_LOG_STD))
        self.below = nn.Parameter(torch.zeros(blocks, d * (d - 1) // 2))
        self.bias_mean = nn.Parameter(torch.zeros(shape[0]))
        self.bias_log_std = nn.Parameter(torch.full(shape[:1], INITIAL_LOG_STD))
        rows, columns = torch.tril_indices(d, d, -1)
        place = torch.full((d, d), len(rows) + 1)  # of an entry of L / diag(L) in what lies below, a one, a zero
        place[rows, columns] = torch.arange(len(rows))
        place[range(d), range(d)] = len(rows)
        self.register_buffer("place", place.flatten())
        self.register_buffer("one_and_zero", torch.tensor([1.0, 0.0]).repeat(blocks, 1))
        for name, like in (("weight_prior_mean", self.weight_mean), ("prior_log_diagonal", self.log_diagonal),
                           ("bias_prior_mean", self.bias_mean), ("bias_prior_log_std", self.bias_mean),
                           ("bias_prior_precision", self.bias_mean)):
            self.register_buffer(name, torch.empty_like(like))
        self.register_buffer("prior_inverse", torch.empty(blocks, d, d))
        self.hand_over()

    def factor(self):
        unit = torch.cat([self.below, self.one_and_zero], 1).index_select(1, self.place)
        blocks, d = self.log_diagonal.shape
        return unit.view(blocks, d, d) * self.log_diagonal.exp().unsqueeze(2)

    @torch.no_grad()
    def hand_over(self):
        self.weight_prior_mean.copy_(self.weight_mean)
        self.prior_log_diagonal.copy_(self.log_diagonal)
        factor = self.factor().double()
        unit = torch.eye(factor.shape[1], dtype=factor.dtype, device=factor.device).expand_as(factor)
        self.prior_inverse.copy_(torch.linalg.solve_triangular(factor, unit, upper=False))
        self.bias_prior_mean.copy_(self.bias_mean)
        self.bias_prior_log_std.copy_(self.bias_log_std)
        self.bias_prior_precision.copy_((-2 * self.bias_log_std).exp())

    def begin(self):
        """The factor, the biases' variance, and this step's draws."""
        factor = self.factor()
        noise = torch.randn_like(self.weight_mean)
        # A sum over rows: a batched product of so small matrices with vectors takes four times as long on a CPU.
        weight = self.weight_mean + (factor * noise.unsqueeze(1)).sum(2)
        bias_std = self.bias_log_std.exp()
        bias = torch.addcmul(self.bias_mean, bias_std, torch.randn_like(bias_std))
        return factor, bias_std * bias_std, weight.view(self.shape), bias

    def forward(self, x, step):
        return F.conv2d(x, step[2], step[3], padding=self.padding)

    def kl(self, step):
        factor, bias_variance = step[:2]
        whitened = torch.bmm(self.prior_inverse, factor)
        shift = (self.prior_inverse * (self.weight_mean - self.weight_prior_mean).unsqueeze(1)).sum(2)
        weights = (0.5 * ((whitened * whitened).sum() + (shift * shift).sum() - shift.numel())
                   + (self.prior_log_diagonal - self.log_diagonal).sum())
        return weights + gaussian_kl(self.bias_mean, self.bias_log_std, bias_variance, self.bias_prior_mean,
                                     self.bias_prior_log_std, self.bias_prior_precision)


class Coupling(nn.Module):
    """A step of masked RealNVP with gates: z' = z where the mask is, else g z + (1 - g) t, with t and the gate's
    logit k from one hidden layer of tanh units that sees the masked z."""

    def __init__(self, mask):
        super().__init__()
        size = mask.numel()
        self.register_buffer("mask", mask)
        self.register_buffer("kept", 1 - mask)
        self.hidden = nn.Linear(size, FLOW_HIDDEN)
        self.shift_and_gate = nn.Linear(FLOW_HIDDEN, 2 * size)
        with torch.no_grad():
            for layer in (self.hidden, self.shift_and_gate):
                layer.weight.normal_(0, 0.1 / math.sqrt(layer.in_features))
            self.hidden.bias.zero_()
            self.shift_and_gate.bias[:size] = 1
            self.shift_and_gate.bias[size:] = 2

    def shift_and_log_gate(self, z):
        shift, gate = self.shift_and_gate(torch.tanh(self.hidden(self.mask * z))).chunk(2)
        return shift, F.logsigmoid(gate) * self.kept  # 0 where the mask is: there the gate is 1, and z stays

    def forward(self, z):
        shift, log_gate = self.shift_and_log_gate(z)
        return torch.lerp(shift, z, log_gate.exp()), log_gate.sum()

    def inverse(self, z):
        """And the logarithm of the Jacobian of forward() there."""
        shift, log_gate = self.shift_and_log_gate(z)
        return shift + (z - shift) * (-log_gate).exp(), log_gate.sum()


class Flow(nn.Module):
    """A distribution of z: a diagonal Gaussian through coupling steps whose masks, fixed, complement each other.
    Log densities leave out D / 2 ln(2 pi), which is the same in every flow over the same z."""

    def __init__(self, size):
        super().__init__()
        self.base_mean = nn.Parameter(torch.ones(size))
        self.base_log_std = nn.Parameter(torch.full((size,), INITIAL_Z_LOG_STD))
        mask = torch.zeros(size)
        mask[torch.randperm(size)[:size // 2]] = 1
        self.steps = nn.ModuleList(Coupling(mask if i % 2 == 0 else 1 - mask) for i in range(FLOW_STEPS))

    def sample(self):
        """One z and its log density."""
        noise = torch.randn_like(self.base_mean)
        z = torch.addcmul(self.base_mean, self.base_log_std.exp(), noise)
        log_density = -0.5 * noise.dot(noise) - self.base_log_std.sum()
        for step in self.steps:
            z, log_jacobian = step(z)
            log_density = log_density - log_jacobian
        return z, log_density

    def log_density(self, z):
        """At any z, through the inverse."""
        log_density = 0.0
        for step in reversed(self.steps):
            z, log_jacobian = step.inverse(z)
            log_density = log_density - log_jacobian
        noise = (z - self.base_mean) * (-self.base_log_std).exp()
        return log_density - 0.5 * noise.dot(noise) - self.base_log_std.sum()


class MultiplicativeLayer(GaussianLayer):
    """z for every filter and channel of a convolution, for every input of a dense layer; one z a step."""

    def __init__(self, shape, padding):
        super().__init__(shape, padding)
        self.z_shape = (*shape[:2], 1, 1) if len(shape) == 4 else shape[1:]
        self.flow = Flow(math.prod(self.z_shape))
        self.hand_over()

    def hand_over(self):
        super().hand_over()
        if hasattr(self, "flow"):
            self.prior_flow = copy.deepcopy(self.flow).requires_grad_(False)

    def begin(self):
        z, log_density = self.flow.sample()
        return *super().begin(), z, log_density

    def moments(self, x, step):
        weight_variance, bias_variance, z, _ = step
        if self.padding is None:  # fewer products than z mu takes
            mean = F.linear(x * z, self.weight_mean, self.bias_mean)
        else:
            mean = self.apply_weights(x, self.weight_mean * z.view(self.z_shape), self.bias_mean)
        return mean, self.apply_weights(x * x, weight_variance, bias_variance)

    def kl(self, step):
        weight_variance, bias_variance, z, log_density = step
        difference = z.view(self.z_shape) * (self.weight_mean - self.weight_prior_mean)
        scaled = (weight_variance + difference * difference) * self.weight_prior_precision
        weights = (self.weight_prior_log_std - self.weight_log_std + 0.5 * scaled).sum() - 0.5 * scaled.numel()
        return weights + self.bias_kl(bias_variance) + log_density - self.prior_flow.log_density(z)


LAYERS = {"ffg": (GaussianLayer, GaussianLayer), "cfg": (CholeskyConv, GaussianLayer),
          "mnf": (MultiplicativeLayer, MultiplicativeLayer)}  # of convolutions, of dense layers


class Bayesian(nn.Module):
    def __init__(self, architecture, family):
        super().__init__()
        self.architecture = architecture
        convolution, dense = LAYERS[family]
        self.layers = nn.ModuleList((dense if padding is None else convolution)(shape, padding)
                                    for shape, padding in architecture.weights())

    def begin(self):
        return [layer.begin() for layer in self.layers]

    def after(self, x, apply, first):
        """The network behind layer `first`, whose output is x; apply(i, x) is layer i."""
        convolutions, last = len(self.architecture.convolutions), len(self.layers) - 1
        for i in range(first, last):
            if i < convolutions:
                x = F.relu(F.max_pool2d(x, self.architecture.window, 2), inplace=True)
            else:
                x = F.relu(x, inplace=True)
            x = apply(i + 1, x.flatten(1) if i + 1 == convolutions else x)
        return x

    def network(self, x, apply):
        return self.after(apply(0, x), apply, 0)

    def loss(self, x, labels):
        step = self.begin()  # for the forward pass and for the KL
        logits = self.network(x, lambda i, x: self.layers[i](x, step[i]))
        kl = sum(layer.kl(s) for layer, s in zip(self.layers, step))
        return F.cross_entropy(logits, labels) + self.architecture.kl_weight * kl


class Predictor:
    """Predictions of an FFG network, averaged over draws of its posterior."""

    def __init__(self, model, samples, wrap):
        self.model, self.samples = model, samples
        self.one_draw, self.one_lrt = wrap(self.one_draw), wrap(self.one_lrt)

    def one_draw(self, x, deviations):
        layers = self.model.layers
        weights = [layer.draw(d) for layer, d in zip(layers, deviations)]
        return self.model.network(x, lambda i, x: layers[i].apply_weights(x, *weights[i])).softmax(1)

    def one_lrt(self, mean, variance, variances):
        layers = self.model.layers
        return self.model.after(sample(mean, variance), lambda i, x: layers[i](x, variances[i]), 0).softmax(1)

    @torch.no_grad()
    def by_weights(self, x):
        """One draw of all weights a sample."""
        deviations = [tuple(v.sqrt() for v in variance) for variance in self.model.begin()]
        return self.average(x, lambda: self.one_draw(x, deviations))

    @torch.no_grad()
    def by_lrt(self, x):
        variances = self.model.begin()
        moments = self.model.layers[0].moments(x, variances[0])  # the same for every sample
        return self.average(x, lambda: self.one_lrt(*moments, variances))

    def average(self, x, one):
        total = torch.zeros(x.shape[0], self.model.architecture.classes, device=x.device)
        for _ in range(self.samples):
            total += one()
        return total / self.samples
