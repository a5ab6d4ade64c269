import subprocess
import sys


def test_versions_are_read_without_loading_any_engine() -> None:
    program = (
        "import sys\n"
        "from kernels import calculators, connectivity, embedding, errors, forcefield\n"
        "from kernels import graph, relaxation, units\n"
        "assert min(embedding.VERSION, forcefield.VERSION, relaxation.VERSION) >= 1\n"
        "assert calculators.levels()['GFN2-xTB'][0] == 'tblite'\n"
        "assert calculators.program_version('tblite')\n"
        "heavy = {'ase', 'rdkit', 'tblite', 'xtb', 'scipy', 'sella', 'jax'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
