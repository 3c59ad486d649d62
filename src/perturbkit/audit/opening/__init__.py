"""Opening a model and data from what a user names, one module a kind of file.

Files are untrusted: nothing is unpickled, arrays are read without objects, weights come as safetensors, estimators as
skops, nothing is fetched from a network, and an image folder is read without following links out of it. Only
``module:function`` runs code, the user's own.
"""

from perturbkit.audit.opening.data import open_data as open_data
from perturbkit.audit.opening.door import open_subject as open_subject
from perturbkit.audit.opening.models import open_model as open_model
