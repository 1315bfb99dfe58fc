"""Write the commented file of a new run from a model and a data set (``mmscale init``).

    MODEL --starting_model--> StartingModel    DATA --prepare_data--> PreparedData    machine --find_machine--> Machine
                              \\__________________ choose_sizes, run_text ______________________/
                                                         |
                                              run.yaml, checked like `config validate`

Every value that another machine or data set would change is written into the file with its reason.
"""
