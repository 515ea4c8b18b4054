"""Runs side by side: a table of what each measured at its start and now, and a picture of the curves.

Command:   python pipelines/compare.py RUN RUN ... [measures=knn/top1,linear/top1|all] [out=comparison]
Expected:  the table in the terminal; comparison/compare.md, compare.json and compare.png.
"""

from ssl_vit.compare import compare_main

if __name__ == "__main__":
    compare_main()
