from .samplers.ddim import sample_ddim as sample_ddim
from .samplers.dpm_solver import sample_dpm_solver as sample_dpm_solver
from .samplers.dpm_solver import sample_dpm_solver_adaptive as sample_dpm_solver_adaptive
from .samplers.dpm_solver import sample_dpm_solver_fast as sample_dpm_solver_fast
