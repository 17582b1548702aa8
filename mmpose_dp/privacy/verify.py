"""``python -m mmpose_dp.privacy.verify`` is ``python -m mmpose_dp.verify``. Must not check anything itself."""

import runpy

if __name__ == '__main__':
    runpy.run_module('mmpose_dp.verify', run_name='__main__')
