#!/usr/bin/env python3
"""Django's door for the shell: `manage.py up` starts everything, `manage.py help` lists the
rest.
"""

import os
import sys

if __name__ == "__main__":
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "snapml_site.settings")
    from django.core.management import execute_from_command_line

    execute_from_command_line(sys.argv)
