from .matrices.fast_matrix_sqrt import lyapunov_solve as lyapunov_solve
from .matrices.fast_matrix_sqrt import matrix_sqrt as matrix_sqrt
