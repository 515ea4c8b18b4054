"""A run on one page: results, curves, pictures, recipe and environment in one file that needs no network.

Command:   python pipelines/report.py RUN ...
Expected:  RUN/report.html; a finished training run has it already, a running one gets it as it stands.
"""

from ssl_vit.html_report import report_main

if __name__ == "__main__":
    report_main()
