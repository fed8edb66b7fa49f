"""The mind: from a Dynamo graph to matches, plans and a lowered graph. Each file is one verb."""
