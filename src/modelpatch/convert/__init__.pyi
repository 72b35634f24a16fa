from .exporting import export as export
from .exporting import state_dict_of as state_dict_of
from .extraction import DELTA_CODECS as DELTA_CODECS
from .extraction import extract as extract
from .merging import diff as diff
from .merging import merge as merge
from .peft import export_peft as export_peft
from .peft import import_peft as import_peft
