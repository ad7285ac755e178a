"""Curvature of the loss of PyTorch models: operators, spectra, traces and eigenvalues with honest error bars."""

from curvature.assets import demo as demo
from curvature.errors import BadFile as BadFile
from curvature.errors import BadObjective as BadObjective
from curvature.errors import CurvatureError as CurvatureError
from curvature.errors import Interrupted as Interrupted
from curvature.errors import NonFinite as NonFinite
from curvature.errors import NotConverged as NotConverged
from curvature.errors import TooLarge as TooLarge
from curvature.errors import UnsafeFile as UnsafeFile
from curvature.linalg.eigen import Eigenpairs as Eigenpairs
from curvature.linalg.eigen import eigsh as eigsh
from curvature.linalg.operator import Identity as Identity
from curvature.linalg.operator import LinearOperator as LinearOperator
from curvature.linalg.operator import MatrixFree as MatrixFree
from curvature.linalg.operator import identity as identity
from curvature.linalg.space import Space as Space
from curvature.linalg.spectrum import SpectralDensity as SpectralDensity
from curvature.linalg.spectrum import spectral_density as spectral_density
from curvature.linalg.structured import Dense as Dense
from curvature.linalg.structured import Diagonal as Diagonal
from curvature.linalg.trace import trace as trace
from curvature.objective.losses import Likelihood as Likelihood
from curvature.objective.losses import Loss as Loss
from curvature.objective.losses.classification import BinaryCrossEntropy as BinaryCrossEntropy
from curvature.objective.losses.classification import CrossEntropy as CrossEntropy
from curvature.objective.losses.classification import KLDivergence as KLDivergence
from curvature.objective.losses.counts import PoissonNLL as PoissonNLL
from curvature.objective.losses.regression import GaussianNLL as GaussianNLL
from curvature.objective.losses.regression import SquaredError as SquaredError
from curvature.objective.objective import Objective as Objective
from curvature.objective.params import ParamSpace as ParamSpace
from curvature.operators.gauss_newton import empirical_fisher as empirical_fisher
from curvature.operators.gauss_newton import fisher as fisher
from curvature.operators.gauss_newton import ggn as ggn
from curvature.operators.gauss_newton import gradient_covariance as gradient_covariance
from curvature.operators.hessian import hessian as hessian
from curvature.operators.jacobian import jacobian as jacobian
from curvature.operators.jacobian import ntk as ntk
from curvature.progress import Progress as Progress
from curvature.progress import Run as Run
from curvature.result import Cost as Cost
from curvature.result import Estimate as Estimate
from curvature.result import Origin as Origin
from curvature.result import Result as Result

__version__ = "0.1.0"
