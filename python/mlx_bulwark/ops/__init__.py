"""The ops: one public function and its reference each."""
