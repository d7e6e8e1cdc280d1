"""Models for others: SaRDinE (base and experts as one model of Transformers), merged experts, model cards."""
