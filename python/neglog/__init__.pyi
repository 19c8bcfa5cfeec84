from neglog import availability as _availability
from neglog import kernels as kernels
from neglog import nn as nn
from neglog import reference as reference
from neglog.grad_cache import cached_step as cached_step
from neglog.losses._result import LossStats as LossStats
from neglog.losses.clip import clip_loss as clip_loss
from neglog.losses.clip import siglip_loss as siglip_loss
from neglog.losses.cross_entropy import cross_entropy as cross_entropy
from neglog.losses.cross_entropy import masked_cross_entropy as masked_cross_entropy
from neglog.losses.info_nce import info_nce as info_nce
from neglog.losses.kl_div import KLDivStats as KLDivStats
from neglog.losses.kl_div import kl_div_loss as kl_div_loss
from neglog.losses.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from neglog.losses.linear_kl_div import linear_kl_div_loss as linear_kl_div_loss
from neglog.losses.nt_xent import dcl as dcl
from neglog.losses.nt_xent import nt_xent as nt_xent
from neglog.losses.similarity import similarity_logsumexp as similarity_logsumexp
from neglog.losses.sup_con import sup_con as sup_con
from neglog.losses.token_logprobs import TokenLogprobs as TokenLogprobs
from neglog.losses.token_logprobs import linear_token_logprobs as linear_token_logprobs
from neglog.losses.token_logprobs import token_logprobs as token_logprobs
from neglog.losses.vocab_parallel import (
    vocab_parallel_cross_entropy as vocab_parallel_cross_entropy,
)
from neglog.losses.vocab_parallel import (
    vocab_parallel_linear_cross_entropy as vocab_parallel_linear_cross_entropy,
)
from neglog.patch import patch_torch as patch_torch
from neglog.route import Route as Route
from neglog.route import explain as explain
from neglog.settings import options as options

__version__: str
dispatch = _availability
