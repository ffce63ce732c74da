"""Many devices. What went wrong in other systems, and where it is tested here:

1. A rank without a token hangs: `mesh_test.test_twenty_steps` (masks leave
   whole devices empty), `torch_cases` "no_tokens", `tensorflow_replica_test`
   (`test_each_replica_computes_its_experts`).
2. Gradients of experts times the number of shards: every comparison of weights
   after training; `mesh_test.test_all_tokens_to_one_expert`.
3. The router's gradient is wrong though the loss is right: the same, and
   `torch_worker.check_gradients`.
4. The clip norm counts some parameters twice: `global_clipnorm` in the
   trainings.
5. A checkpoint keeps one rank's experts, or loses optimizer state:
   `mesh_test.test_saved_on_other_numbers_of_devices`, `orbax_test`,
   `torch_worker.check_moved` and `check_sharded`, `tensorflow_replica_test`.
6. Auxiliary losses times gradient accumulation: accumulation in the trainings.
7. The scale of auxiliary losses depends on the division: the trainings' losses
   and logs; tests/losses/whole_batch_test.py.
8. Recomputation routes otherwise, or counts twice: `mesh_more_test`
   (`test_recomputation`), `torch_cases` "recomputed",
   `tensorflow_replica_test`.
9. Evaluation or padding moves the bias: `test_evaluation_moves_no_state` and
   `torch_worker.check_inference`; masks in the trainings.
10. A sequence's loss depends on the batch: `mesh_more_test`
    (`test_losses_of_sequences_do_not_depend_on_the_batch`).
11. The expert bias depends on the model axis: `num_model_shards` in
    `mesh_test.test_twenty_steps`.
12. Tensor parallelism corrupts silently: `mesh_test.test_hidden_width`,
    `model_parallel` in `test_twenty_steps`, `mesh_more_test.test_layouts`.
13. The exchange hangs, or its gradient is wrong, if the division is uneven:
    `mesh_test.test_all_tokens_to_one_expert`, `torch_cases` "empty_experts".
14. A capacity beyond the number of tokens, and 15. the gradient of a router
    that chooses one expert: `mesh_more_test`
    (`test_one_choice_and_more_room_than_tokens`).
"""
