"""`python -m minirl_edu.course.capstone 03 my_minirl.py`."""

import sys

from minirl_edu.course.capstone import main

sys.exit(main())
