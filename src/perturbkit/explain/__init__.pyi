from .gradient.integrated_gradients import AxiomReport as AxiomReport
from .gradient.integrated_gradients import adaptive_integrated_gradients as adaptive_integrated_gradients
from .gradient.integrated_gradients import check_axioms as check_axioms
from .gradient.integrated_gradients import integrated_gradients as integrated_gradients
from .removal.occlusion import occlusion as occlusion
