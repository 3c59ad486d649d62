from . import audit as audit
from . import core as core
from . import data as data
from . import explain as explain
from . import papers as papers
from . import robust as robust
from . import uncertainty as uncertainty
